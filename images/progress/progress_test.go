package progress

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// fixed makes a reporter whose clock goes on one second with each look.
func fixed(out io.Writer, style Style) *Reporter {
	r := New(out, style)
	now := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	r.now = func() time.Time { now = now.Add(time.Second); return now }
	return r
}

func run(r *Reporter) {
	s := r.Step("Debian kernel")
	s.Bytes(5_000_000, 10_000_000)
	s.Note("linux-image")
	s.Done("6.12")
	r.Step("Firmware").Skip("unchanged")
	_ = r.Step("Loaders").Fail(errors.New("no mirror"))
}

func TestStyles(t *testing.T) {
	tests := []struct {
		name  string
		style Style
		want  []string // in this order
		not   string
	}{
		{"plain", Plain, []string{"✓ Debian kernel", "6.12\n", "· Firmware", "unchanged\n", "✗ Loaders", "failed\n"}, "no mirror"},
		{"terminal", Terminal, []string{"  Debian kernel", "50 % of 10.0 MB", "linux-image", "\r\x1b[K✓ Debian kernel"}, ""},
		{"json", JSON, []string{`{"event":"start","step":"Debian kernel"`, `"bytes":5000000,"total_bytes":10000000`,
			`{"event":"done"`, `{"event":"skip"`, `"event":"fail","step":"Loaders"`, `"detail":"no mirror"`}, "\x1b"},
		{"quiet", Quiet, nil, "Debian"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			run(fixed(&out, tt.style))
			rest := out.String()
			for _, want := range tt.want {
				_, after, found := strings.Cut(rest, want)
				if !found {
					t.Fatalf("no %q in what is left of the output:\n%q", want, rest)
				}
				rest = after
			}
			if tt.not != "" && strings.Contains(out.String(), tt.not) {
				t.Errorf("%q is in the output:\n%q", tt.not, out.String())
			}
		})
	}
}

func TestRelayShowsInItsParent(t *testing.T) {
	var out bytes.Buffer
	r := fixed(&out, JSON)
	parent := r.Step("Debian root")
	inner := NewRelay()
	inner.Into(parent)
	s := inner.Step("download")
	s.Bytes(7, 9)
	s.Done("all")
	parent.Done("built")
	if got := out.String(); !strings.Contains(got, `"step":"Debian root"`) || !strings.Contains(got, `"bytes":7,"total_bytes":9,"detail":"download`) {
		t.Errorf("the parent doesn't show its relay:\n%s", got)
	}
	if strings.Contains(out.String(), `"step":"download"`) {
		t.Errorf("the relay has lines of its own:\n%s", out.String())
	}
}

func TestWriterCounts(t *testing.T) {
	var out, sink bytes.Buffer
	s := fixed(&out, JSON).Step("copy")
	if _, err := io.WriteString(s.Writer(&sink, 10), "12345"); err != nil {
		t.Fatal(err)
	}
	if sink.String() != "12345" || !strings.Contains(out.String(), `"bytes":5,"total_bytes":10`) {
		t.Errorf("wrote %q, reported %s", sink.String(), out.String())
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 12_345: "12.3 kB", 9_999_999: "10.0 MB", 2_500_000_000: "2.50 GB"} {
		if got := Size(n); got != want {
			t.Errorf("Size(%d) = %q, want %q", n, got, want)
		}
	}
}
