"""bus/abi"""
