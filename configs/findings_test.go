package configs

import (
	"os"
	"strings"
	"testing"
)

// TestFindings runs the cases of testdata/findings.txt: a title after "== ",
// the text of a cluster.yaml, a line "=>", and all that Parse has to say about
// it. With -update the last part is rewritten; read the diff.
func TestFindings(t *testing.T) {
	const file = "testdata/findings.txt"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, _ := strings.Cut(string(text), "== ")
	out := head
	for _, c := range strings.Split(rest, "\n== ") {
		title, body, _ := strings.Cut(c, "\n")
		in, want, ok := strings.Cut(body, "=>\n")
		if !ok {
			t.Fatalf("case %q has no line =>", title)
		}
		got := "accepted"
		if _, err := Parse("cluster.yaml", []byte(in)); err != nil {
			got = err.Error()
		}
		if want = strings.TrimRight(want, "\n"); got != want && !*update {
			t.Errorf("%s\n got: %s\nwant: %s", title, got, want)
		}
		out += "== " + title + "\n" + in + "=>\n" + got + "\n\n"
	}
	if *update {
		golden(t, file, []byte(out))
	}
}
