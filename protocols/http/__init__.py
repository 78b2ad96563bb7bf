"""HTTP/1.1: sessions, answers, multipart bodies, authorization. For every protocol that is spoken over HTTP."""
