"""Message models: everything that crosses a process boundary, validated once, at the boundary."""
