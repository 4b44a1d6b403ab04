"""Documents of files, folders and streams, in an order that depends on the data alone; a kind of source is a file here.

May import observe; data/config.py and the other folders of data may import it.
"""
