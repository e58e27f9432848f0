"""ASGI middleware: what every request passes before and after its route.

`osiris.server` adds the classes, from the innermost to the outermost.
"""
