"""What SEDAC costs and gains, as figures; each benchmark is a program of its own."""
