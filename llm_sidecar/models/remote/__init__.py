"""Models on other servers, which speak OpenAI's protocol."""
