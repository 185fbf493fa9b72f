"""Silos' data: built-in data sets, folders of images, partitions, FLamby's packages."""
