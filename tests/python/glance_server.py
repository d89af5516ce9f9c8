"""Serves Glance: the stock application of its package, on a port of 127.0.0.1, for tests."""

import sys
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server

from glance.wsgi.api import application


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


make_server("127.0.0.1", int(sys.argv[1]), application, Server).serve_forever()
