"""The networks, written by hand; they load the official weights through convert_sd2.py."""
