def test_x(tiny_data, gpt2_cache, sample_stories):
    import json
    print([json.loads(p.read_text()) for p in tiny_data.glob("*n.json")])
    print(list(tiny_data.iterdir()))
