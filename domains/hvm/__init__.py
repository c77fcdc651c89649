"""domains/hvm"""
