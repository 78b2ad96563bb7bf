"""Talaria's own API, `/talaria/api/v1`: each module is a list of routes that declare the role that they need."""
