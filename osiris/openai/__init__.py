"""The part of the OpenAI API that the sidecar serves: every path under `/v1`.

See https://platform.openai.com/docs/api-reference.
"""
