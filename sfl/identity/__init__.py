"""Who a node is: certificates, what they say, and what they allow.

`identity`, `node` and `rights` need the standard library only, since devices have them; `authority` and `folder` make
certificates, `revoked` and `peer` read those of others, with the `cryptography` package. Nothing here knows of connections.
"""
