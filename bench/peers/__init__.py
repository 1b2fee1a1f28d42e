"""One file per rival, and the file that writes our weights in llama.cpp's format."""
