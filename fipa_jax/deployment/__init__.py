"""How does a federation run on machines of its own? What travels, the server, a client, and Flower as the transport.

`wire` says what an upload and a broadcast are as bytes, `agreement` what server and clients share, `server` is the
server that any transport can call, `site` one client beside its data. `flower` carries their bytes over Flower, and
`worker` keeps a client's process warm between two messages.
"""
