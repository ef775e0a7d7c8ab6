"""The live page: streams in a browser, over a small ASGI server on top of
`pipelines/session_pool.py`. Needs the extra `serve`.
"""
