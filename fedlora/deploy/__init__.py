"""A real federation: the data owner's node, the server, and what keeps both going."""
