"""`maple serve`: the page and the HTTP APIs, over one process that draws.

The server process answers; it never draws. A worker process of its own (worker.py) holds the models
and draws with the public Python API, so that a picture that takes a minute, runs out of memory or
crashes takes nothing else with it.

    request -> security -> api/{v1,a1111,openai} -> Studio (queue, history) -> worker process

config.py what may be asked for · uploads.py pictures that come in · queue.py whose turn it is ·
store.py what outlives the process · link.py the worker from outside · catalog.py models by name ·
studio.py all of it together · app.py the ASGI application.

It needs the packages of the extra `serve`.
"""
