"""Native domains: programs of the project's own that reach Xen only through the interface that a guest has (Dom0, DomIO)."""
