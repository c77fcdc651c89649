"""toolstack"""
