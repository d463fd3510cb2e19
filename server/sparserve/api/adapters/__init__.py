"""Other projects' gRPC protocols on the same engine, on a listener of their own."""
