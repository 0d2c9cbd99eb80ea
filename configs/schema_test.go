package configs

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with a committed file.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what comes out now; if that is right, run the test with -update\ngot:\n%s", file, got)
	}
}

func TestSchema(t *testing.T) {
	got, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "cluster.schema.json", got)

	// Whatever is an object must say that it takes no other fields.
	var walk func(path string, v any)
	walk = func(path string, v any) {
		m, ok := v.(map[string]any)
		if !ok {
			return
		}
		if m["type"] == "object" && m["additionalProperties"] != false {
			t.Errorf("%s takes additional properties", path)
		}
		for k, sub := range m {
			walk(path+"/"+k, sub)
		}
	}
	var tree any
	if err := json.Unmarshal(got, &tree); err != nil {
		t.Fatal(err)
	}
	walk("", tree)
}
