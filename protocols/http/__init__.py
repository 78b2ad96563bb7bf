"""HTTP/1.1: sessions, answers, multipart bodies, authorization, proxies. Every protocol over HTTP may use it."""
