"""Parameters that are fetched before they are used, and leave afterwards."""
