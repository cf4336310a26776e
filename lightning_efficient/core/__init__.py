"""Bricks that several techniques share; nothing here knows Lightning."""
