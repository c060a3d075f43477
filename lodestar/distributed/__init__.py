"""The runtime of ranks, their collectives, and the watchdog for lost ranks."""
