"""Both ends of the way to xenstored: the ring page, the messages, a client, and the states of split devices."""
