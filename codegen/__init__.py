"""Graph -> Program: kernel texts, launches and buffer table. Nothing here imports cuda."""
