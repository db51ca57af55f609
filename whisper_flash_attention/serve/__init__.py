"""The server: OpenAI's audio API over HTTP, on one running batch per model.

`scheduler.py` owns a model and the thread that runs its batch, `jobs.py` is what it takes;
`fields.py` declares the fields of a request and checks them, `responses.py` renders results,
`app.py` binds both to routes, `realtime.py` is the websocket, `page.html` the page at `/`. Nothing
else may know of HTTP.
"""
