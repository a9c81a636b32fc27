"""One contract for the simulated servers and the real ones: what the simulation does, a server does."""
