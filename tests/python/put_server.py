"""A plain HTTP store for tests: PUT and GET (with Range) of files in a folder, on a port of 127.0.0.1.

put_server.py PORT FOLDER BREAK: BREAK, if not 0, is after how many bytes every GET of something longer breaks off.
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, FOLDER, BREAK = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def file(self):
        return os.path.join(FOLDER, os.path.basename(self.path))

    def answer(self, status, length=0, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        with open(self.file(), "wb") as out:
            while left:
                block = self.rfile.read(min(left, 1 << 16))
                if not block:
                    return
                out.write(block)
                left -= len(block)
        self.answer(201)

    def do_GET(self):
        if not os.path.exists(self.file()):
            return self.answer(404)
        size = os.path.getsize(self.file())
        asked = self.headers.get("Range")
        start = int(asked[len("bytes=") :].split("-")[0]) if asked else 0
        if asked and start >= size:
            return self.answer(416, Content_Range="bytes */%d" % size)
        if asked:
            self.answer(206, size - start, Content_Range="bytes %d-%d/%d" % (start, size - 1, size))
        else:
            self.answer(200, size)
        with open(self.file(), "rb") as source:
            source.seek(start)
            body = source.read()
        if BREAK and len(body) > BREAK:
            self.wfile.write(body[:BREAK])
            self.close_connection = True
            return
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
