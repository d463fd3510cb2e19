"""Other projects' gRPC protocols on the same engine, on a listener of their own."""

# Of all requests that come that way: no key has this name, so whoever reaches the adapters, which ask for none,
# neither ends requests of our own API nor takes their ids.
OWNER = "adapters/"
