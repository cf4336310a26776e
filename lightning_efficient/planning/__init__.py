"""Plan: a few measured steps of your own run say where memory and time go, and which techniques are worth it."""
