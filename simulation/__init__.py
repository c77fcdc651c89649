"""The machine in one process, on a seeded clock, a seeded scheduler and a fault plan. See docs/faults.md."""
