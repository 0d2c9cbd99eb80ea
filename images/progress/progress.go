// Package progress reports long work: which step runs, how far it is (bytes or
// a count), how long it took. There are three ways to show it: a terminal gets
// one live line per step, a pipe gets one line per finished step, and --json
// gets one JSON object per event. A program that wants silence passes Discard.
package progress

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// Reporter starts steps. It is safe for concurrent use.
type Reporter struct {
	mu    sync.Mutex
	out   io.Writer
	style Style
	now   func() time.Time
	live  bool // a live line is on the terminal; guarded by mu

	parent *Step // of a relay; guarded by mu
}

// Style says how a Reporter shows progress.
type Style int

const (
	Plain    Style = iota // one line per finished step
	Terminal              // one live line, replaced in place
	JSON                  // one object per event
	Quiet                 // nothing
	relay                 // see NewRelay
)

// New returns a reporter that writes to out.
func New(out io.Writer, style Style) *Reporter {
	return &Reporter{out: out, style: style, now: time.Now}
}

// Discard is a reporter that shows nothing.
func Discard() *Reporter { return New(io.Discard, Quiet) }

// NewRelay returns a reporter for work inside another step: what its steps are
// at shows as the detail of the step last given to Into, and they have no lines
// of their own.
func NewRelay() *Reporter { return New(io.Discard, relay) }

// Into says which step shows a relay's reports.
func (r *Reporter) Into(s *Step) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.parent = s
}

// Step is one piece of work under way. Finish it with Done or Fail.
type Step struct {
	r       *Reporter
	name    string
	start   time.Time
	shown   time.Time // guarded by r.mu
	detail  string    // guarded by r.mu
	current int64     // guarded by r.mu
	total   int64     // guarded by r.mu; 0: unknown
}

// Event is the JSON form of a report.
type Event struct {
	Event   string  `json:"event"` // start, progress, done, skip or fail
	Step    string  `json:"step"`
	Seconds float64 `json:"seconds"`
	Bytes   int64   `json:"bytes,omitempty"`
	Total   int64   `json:"total_bytes,omitempty"`
	Detail  string  `json:"detail,omitempty"`
}

// Step begins a step. The name is a short noun phrase ("Debian packages").
func (r *Reporter) Step(name string) *Step {
	s := &Step{r: r, name: name, start: r.now()}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.emit("start")
	return s
}

// Bytes says that done of total bytes are through; total 0 is unknown.
func (s *Step) Bytes(done, total int64) {
	s.update(func() { s.current, s.total = done, total })
}

// Note shows what the step is at, for example a package name.
func (s *Step) Note(format string, args ...any) {
	s.update(func() { s.detail = fmt.Sprintf(format, args...) })
}

// Done finishes the step; the detail says what came of it.
func (s *Step) Done(format string, args ...any) { s.finish("done", fmt.Sprintf(format, args...)) }

// Skip finishes a step that had nothing to do, with the reason.
func (s *Step) Skip(format string, args ...any) { s.finish("skip", fmt.Sprintf(format, args...)) }

// Fail finishes the step with the error and returns it unchanged. People read
// the error once, from whoever it is returned to; JSON has it in the event.
func (s *Step) Fail(err error) error {
	detail := "failed"
	if s.r.style == JSON {
		detail = err.Error()
	}
	s.finish("fail", detail)
	return err
}

func (s *Step) update(change func()) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	change()
	if now := s.r.now(); now.Sub(s.shown) >= 100*time.Millisecond {
		s.shown = now
		s.emit("progress")
	}
}

func (s *Step) finish(event, detail string) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	s.detail = detail
	s.emit(event)
}

// emit writes one event; the caller holds r.mu.
func (s *Step) emit(event string) {
	r := s.r
	took := r.now().Sub(s.start).Seconds()
	switch r.style {
	case relay:
		if r.parent != nil && event != "fail" {
			detail := s.name
			if s.detail != "" {
				detail += ": " + s.detail
			}
			r.parent.update(func() { r.parent.current, r.parent.total, r.parent.detail = s.current, s.total, detail })
		}
	case JSON:
		line, _ := json.Marshal(Event{event, s.name, took, s.current, s.total, s.detail})
		fmt.Fprintf(r.out, "%s\n", line)
	case Terminal:
		if r.live {
			fmt.Fprint(r.out, "\r\x1b[K")
			r.live = false
		}
		if event == "start" || event == "progress" {
			fmt.Fprintf(r.out, "  %-28s %s", s.name, s.state(took))
			r.live = true
			return
		}
		fmt.Fprintf(r.out, "%s %-28s %s\n", mark(event), s.name, s.result(took))
	case Plain:
		if event == "done" || event == "skip" || event == "fail" {
			fmt.Fprintf(r.out, "%s %-28s %s\n", mark(event), s.name, s.result(took))
		}
	}
}

func (s *Step) state(took float64) string {
	line := fmt.Sprintf("%5.1f s", took)
	if s.total > 0 {
		line += fmt.Sprintf("  %3d %% of %s", 100*s.current/s.total, Size(s.total))
	} else if s.current > 0 {
		line += "  " + Size(s.current)
	}
	if s.detail != "" {
		detail := s.detail
		if len(detail) > 36 {
			detail = detail[:36]
		}
		line += "  " + detail
	}
	return line
}

func (s *Step) result(took float64) string {
	return fmt.Sprintf("%5.1f s  %s", took, s.detail)
}

func mark(event string) string {
	switch event {
	case "fail":
		return "✗"
	case "skip":
		return "·"
	}
	return "✓"
}

// Size prints a number of bytes for people: 912 B, 12.3 MB.
func Size(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1000*1000:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	case n < 1000*1000*1000:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.2f GB", float64(n)/1e9)
}

// Writer counts what passes through it into the step.
func (s *Step) Writer(w io.Writer, total int64) io.Writer {
	return &countingWriter{w: w, step: s, total: total}
}

type countingWriter struct {
	w     io.Writer
	step  *Step
	n     int64
	total int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	c.step.Bytes(c.n, c.total)
	return n, err
}
