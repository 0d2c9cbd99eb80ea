package bootlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

type instant struct{}

func (instant) Now() time.Time { return time.Time{} }
func (instant) After(time.Duration) <-chan time.Time {
	ch := make(chan time.Time, 1)
	ch <- time.Time{}
	return ch
}

func newTimeline(pending []Stage) *Timeline {
	n := time.Duration(0)
	return NewTimeline(slog.New(slog.NewTextHandler(io.Discard, nil)), instant{}, func() time.Duration { n += time.Second; return n }, pending)
}

// head answers posts from a script, then accepts.
type head struct {
	mu     sync.Mutex
	script []error
	got    []string
}

func (h *head) post(_ context.Context, s Stage) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.script) > 0 {
		err := h.script[0]
		h.script = h.script[1:]
		if err != nil {
			return err
		}
	}
	h.got = append(h.got, fmt.Sprintf("%s@%d", s.Name, s.UptimeMS))
	return nil
}

func TestTimelinePostsInOrderWhateverTheHeadDoes(t *testing.T) {
	away, rejected := errors.New("connection refused"), fmt.Errorf("%w: 400", ErrRejected)
	for _, tc := range []struct {
		name    string
		pending []Stage
		script  []error
		want    string
	}{
		{"at once", nil, nil, "link@1000 lease@2000"},
		{"what stage 1 left behind comes first", []Stage{{Name: StageStage1, UptimeMS: 5}}, nil, "stage1@5 link@1000 lease@2000"},
		{"head away at first", nil, []error{away, away, away}, "link@1000 lease@2000"},
		{"a rejected stage is dropped", nil, []error{rejected}, "lease@2000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tl := newTimeline(tc.pending)
			h := &head{script: tc.script}
			tl.Reached(StageLink, "eth0")
			tl.Reached(StageLease, "10.0.0.1")
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- tl.Run(ctx, h.post) }()
			tl.Flush(context.Background())
			cancel()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(h.got, " "); got != tc.want {
				t.Errorf("head got %q, want %q", got, tc.want)
			}
			if p := tl.Pending(); len(p) != 0 {
				t.Errorf("still pending: %v", p)
			}
		})
	}
}

func TestTimelineIsBounded(t *testing.T) {
	tl := newTimeline(nil)
	for range maxPending + 10 {
		tl.Reached(StageContainer, "again")
	}
	p := tl.Pending()
	if len(p) != maxPending || p[0].UptimeMS != 11000 {
		t.Errorf("%d pending, first %+v", len(p), p[0])
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	tl.Flush(ctx) // nobody posts: returns with ctx
}

func TestHandler(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(NewHandler(&b, slog.LevelInfo, func() time.Duration { return 4217 * time.Millisecond }))
	log.Debug("unseen")
	log.Info("link: eth0")
	log.With("component", "lease").Warn("no answer", "mac", "52:54:00:12:34:56", "err", errors.New("timed out"), "empty", "")
	log.Error("bad\nluck")
	const want = "[    4.217000] krg: link: eth0\n" +
		"[    4.217000] krg: warning: no answer component=lease mac=52:54:00:12:34:56 err=\"timed out\" empty=\"\"\n" +
		"[    4.217000] krg: error: bad\nluck\n"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestConsoleNeverBlocks(t *testing.T) {
	stuck, release := io.Pipe()
	c := NewConsole(release)
	for range backlog + 10 {
		if _, err := fmt.Fprintln(c, "line"); err != nil {
			t.Fatal(err)
		}
	}
	stuck.Close()
	c.Flush(time.Minute)
}

func TestConsoleFlushes(t *testing.T) {
	var b bytes.Buffer
	c := NewConsole(&b)
	fmt.Fprintln(c, "one")
	fmt.Fprintln(c, "two")
	c.Flush(time.Minute)
	if b.String() != "one\ntwo\n" {
		t.Errorf("console got %q", b.String())
	}
}

func TestKmsg(t *testing.T) {
	var b bytes.Buffer
	fmt.Fprint(kmsg{&b}, "[    4.217000] krg: link\n")
	if b.String() != "<31>krg: link\n" {
		t.Errorf("got %q", b.String())
	}
}
