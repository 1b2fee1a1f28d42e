"""The server: the engine behind HTTP, and what is seen of it from outside.

    bytes -> `intake` (size, time, strict JSON) -> `protocol` (pydantic: what may be asked)
          -> `asks` (prompts, sampling) -> `answers` (submit, deltas, cancel)
          -> `chat` | `completions` (OpenAI's shapes) -> `streaming` (one JSON or SSE) -> bytes

`app` puts the routes together, `gate` stands before them (API key, request ids), `errors` says no
in OpenAI's envelope, `run` keeps it up: uvicorn (`connections`), loading, signals, draining.
"""
