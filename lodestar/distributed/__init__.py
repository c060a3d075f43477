"""Ranks: who this process is, and what ranks say to each other."""
