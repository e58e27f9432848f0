"""Request and response models of the HTTP contract.

The OpenAPI document is generated from them, so every field has a description with its unit, and an
example.
"""
