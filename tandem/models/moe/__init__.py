"""Models with experts: stacked experts, what their routers pick, and forwards that are held to that."""
