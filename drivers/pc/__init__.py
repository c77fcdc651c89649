"""The devices of a PC as state machines without I/O: what an HVM guest finds at its ports. docs/devices-pc.md lists them."""
