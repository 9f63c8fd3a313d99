"""Generated from proto/sfl/v1 by `make stubs`; a test regenerates and compares."""
