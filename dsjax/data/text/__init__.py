"""Documents of files, folders and streams, in an order that depends on the data alone.

Imports data/config.py and observe; the other folders of data may import it.
"""
