package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/services/cluster/wire"
)

var silent = slog.New(slog.DiscardHandler)

func TestCollector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		c := NewCollector(time.Now)
		go c.Run(ctx)
		log := slog.New(c.Handler(slog.LevelInfo)).With("component", "cluster").WithGroup("g").With("a", 1)
		log.Debug("not this")
		log.Warn("hello", "b", slog.GroupValue(slog.Int("c", 2)))
		c.Add(SourceKernel, slog.LevelError, "oops\xff"+strings.Repeat("x", 3000), nil)
		b := <-c.Batches()
		if len(b.Records) != 2 || b.Dropped != 0 {
			t.Fatalf("%v", b)
		}
		r := b.Records[0]
		if r.Source != "krgd" || r.Message != "hello" || r.Level != int32(slog.LevelWarn) ||
			fmt.Sprint(r.Attributes) != "map[component:cluster g.a:1 g.b.c:2]" {
			t.Errorf("%v", r)
		}
		if m := b.Records[1].Message; len(m) > maxMessage+2 || !strings.HasPrefix(m, "oops\uFFFD") || !strings.HasSuffix(m, "…") {
			t.Errorf("message of %d bytes: %.10q", len(m), m)
		}
	})
}

// TestCollectorFlood: a source that writes without end takes no more than its
// share, and what is lost is counted.
func TestCollectorFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		c := NewCollector(time.Now)
		const each, rounds = 1000, 100
		for range rounds { // nobody takes a batch: the head is away
			for range each {
				c.Add(SourceContainer, slog.LevelInfo, "again", nil)
			}
			time.Sleep(time.Second)
		}
		c.Add(SourceKernel, slog.LevelError, "the one that matters", nil)
		go c.Run(ctx)
		var kept, dropped uint64
		last := ""
		for kept+dropped < each*rounds+1 {
			b := <-c.Batches()
			kept += uint64(len(b.Records))
			dropped += b.Dropped
			last = b.Records[len(b.Records)-1].Message
		}
		if kept > queue || last != "the one that matters" {
			t.Errorf("kept %d of %d, last %q", kept, each*rounds, last)
		}
	})
}

func TestKernelLine(t *testing.T) {
	for line, want := range map[string]string{
		"3,12,5140900,-;nfs: server 10.77.0.254 not responding\n SUBSYSTEM=x\n": "kernel ERROR nfs: server 10.77.0.254 not responding",
		"4,12,5140900,-;hung":                     "kernel WARN hung",
		"6,339,5140900,-,caller=T1;NET: family":   "",
		"31,3,1,-;krg: container pid=7":           "init INFO container pid=7",
		"31,3,1,-;krg: warning: slow":             "init WARN slow",
		"31,3,1,-;krg: error: broken":             "init ERROR broken",
		"31,3,1,-;someone else":                   "",
		"12,3,1,-;user space warns":               "",
		"0,4294967296000,1,c;panic; with a stop;": "kernel ERROR panic; with a stop;",
	} {
		k, err := parseKernel([]byte(line))
		got := ""
		if source, level, text, ok := k.record(); ok {
			got = fmt.Sprint(source, " ", level, " ", text)
		}
		if err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", line, got, err, want)
		}
	}
	for _, line := range []string{"", ";", "a,b,c,d;x", "1,2,3;x", "1,2,3,-", "-1,2,3,-;x"} {
		if k, err := parseKernel([]byte(line)); err == nil {
			t.Errorf("%q: %+v", line, k)
		}
	}
}

func FuzzParseKernel(f *testing.F) {
	f.Add([]byte("6,339,5140900,-;NET: Registered\n SUBSYSTEM=net\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKernel(b)
		if err != nil {
			return
		}
		if source, _, _, ok := k.record(); ok != (source != "") {
			t.Errorf("%q: source %q, %v", b, source, ok)
		}
	})
}

// device gives a record at each Read, as /dev/kmsg does.
type device []string

func (d *device) Read(b []byte) (int, error) {
	if len(*d) == 0 {
		return 0, io.EOF
	}
	n := copy(b, (*d)[0])
	*d = (*d)[1:]
	if n == 0 {
		return 0, unix.EPIPE
	}
	return n, nil
}

func TestReadKernel(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "mark")
	records := device{"4,1,0,-;one\n", "", "junk", "6,2,0,-;nothing\n", "4,3,0,-;three\n"}
	for i, want := range []string{"[one three]", "[four]"} {
		c := NewCollector(time.Now)
		d := append(device(nil), records...)
		if err := c.readKernel(t.Context(), &d, mark); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range c.take().GetRecords() {
			got = append(got, r.Message)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("reader %d: %v, want %s", i, got, want)
		}
		records = append(records, "4,4,0,-;four\n") // the next daemon sees all of them again
	}
}

func TestReadContainer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		pieces := []string{"one\ntw", "", "o\r\n\nthree"}
		all := ""
		c := NewCollector(time.Now)
		go c.ReadContainer(ctx, func(_ context.Context, after uint64) (string, uint64, error) {
			if len(pieces) == 0 {
				return "", 0, errors.New("init is busy")
			}
			all += pieces[0]
			pieces = pieces[1:]
			return all[after:], uint64(len(all)), nil
		})
		time.Sleep(time.Minute)
		var got []string
		for _, r := range c.take().Records {
			got = append(got, r.Source+" "+r.Message)
		}
		if fmt.Sprint(got) != "[container one container two]" {
			t.Errorf("%q", got)
		}
	})
}

func batch(dropped uint64, messages ...string) *wire.LogBatch {
	b := &wire.LogBatch{Dropped: dropped}
	for _, m := range messages {
		b.Records = append(b.Records, &wire.LogRecord{TimeUnixNano: 1e18, Source: "krgd", Level: 4, Message: m, Attributes: map[string]string{"k": "v w"}})
	}
	return b
}

func collect(t *testing.T, dir string, f Filter) []string {
	t.Helper()
	var got []string
	for r, err := range Read(t.Context(), dir, f, false) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(r.Node, " ", r.Message))
	}
	return got
}

func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "logs")
	if got := collect(t, dir, Filter{}); got != nil {
		t.Errorf("no directory: %q", got)
	}
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	s, err := Open(dir, func() time.Time { return now }, silent)
	if err != nil {
		t.Fatal(err)
	}
	s.Add(1, batch(0, "a", "b"))
	now = now.Add(time.Hour)
	s.Add(2, batch(7, "c\x1b[2J"))
	s.Add(1, &wire.LogBatch{Records: []*wire.LogRecord{{Level: -4, Message: "debug"}}})
	for _, tc := range []struct {
		f    Filter
		want string
	}{
		{Filter{Level: slog.LevelDebug}, `["1 a" "1 b" "2 c\x1b[2J" "2 7 records were lost: too many at once" "1 debug"]`},
		{Filter{Nodes: []int{2, 3}}, `["2 c\x1b[2J" "2 7 records were lost: too many at once"]`},
		{Filter{Since: now, Level: slog.LevelDebug, Nodes: []int{1}}, `["1 debug"]`},
		{Filter{Last: 3}, `["1 b" "2 c\x1b[2J" "2 7 records were lost: too many at once"]`},
		{Filter{Last: 1}, `["2 7 records were lost: too many at once"]`},
	} {
		if got := fmt.Sprintf("%q", collect(t, dir, tc.f)); got != tc.want {
			t.Errorf("%+v:\n%s\nwant %s", tc.f, got, tc.want)
		}
	}
	if c := s.Counts()[2]; c != (Counts{1, 7}) {
		t.Errorf("%+v", c)
	}
	for r := range Read(t.Context(), dir, Filter{Nodes: []int{2}}, false) {
		if text := r.Text(); strings.Contains(text, "\x1b") || !strings.Contains(text, `node 2   krgd      WARN  c\x1b[2J k="v w"`) {
			t.Errorf("%q", text)
		}
		break
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	s.Add(1, batch(0, "after the end"))

	// Half a line of a killed head doesn't spoil the next one.
	f, err := os.OpenFile(filepath.Join(dir, currentFile), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, `{"node":`)
	f.Close()
	if s, err = Open(dir, func() time.Time { return now }, silent); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Add(3, batch(0, "next"))
	if got := collect(t, dir, Filter{Nodes: []int{3}}); fmt.Sprint(got) != "[3 next]" {
		t.Errorf("%q", got)
	}
}

// TestStoreBounds: what nodes send takes only so much of the disk.
func TestStoreBounds(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	s, err := Open(dir, func() time.Time { return now }, silent)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.fileSize = 10_000
	for i := range 3000 {
		now = now.Add(100 * time.Millisecond)
		s.Add(1, batch(0, fmt.Sprintf("message %d", i)))
	}
	var size int64
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if len(entries) != files || size > files*s.fileSize {
		t.Errorf("%d files, %d bytes", len(entries), size)
	}
	got := collect(t, dir, Filter{})
	for i := range got {
		if want := fmt.Sprintf("1 message %d", 3000-len(got)+i); got[i] != want {
			t.Fatalf("record %d is %q, want %q", i, got[i], want)
		}
	}
	// A node that sends without pause is cut short.
	before := len(collect(t, dir, Filter{Nodes: []int{2}}))
	s.fileSize = fileSize
	for range 100 {
		s.Add(2, batch(0, strings.Split(strings.Repeat("x ", 100), " ")...))
	}
	if got := len(collect(t, dir, Filter{Nodes: []int{2}})) - before; got > nodeBurst+100 {
		t.Errorf("%d records at once", got)
	}
}

func TestFollow(t *testing.T) {
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	got := make(chan string)
	go func() {
		defer close(got)
		for r, err := range Read(ctx, dir, Filter{Last: 1}, true) {
			if err != nil {
				t.Error(err)
				return
			}
			got <- r.Message
		}
	}()
	s, err := Open(dir, time.Now, silent)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.fileSize = 300 // a file for each batch
	for i := range 5 {
		s.Add(1, batch(0, fmt.Sprint("a", i), fmt.Sprint("b", i)))
		if i == 0 { // Last may have left out the first
			if m := <-got; m == "a0" {
				<-got
			}
			continue
		}
		if a, b := <-got, <-got; a != fmt.Sprint("a", i) || b != fmt.Sprint("b", i) {
			t.Errorf("got %q and %q", a, b)
		}
	}
	stop()
	for m := range got {
		t.Errorf("got %q", m)
	}
}
