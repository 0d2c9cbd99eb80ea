package trial

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"krgimage/images/progress"
)

// board shows how far the machines are: on a terminal one live line each until
// all have settled, elsewhere one line per stage, or JSON events. It is used by
// one goroutine.
type board struct {
	out   io.Writer
	style progress.Style
	now   func() time.Time

	drawn int                    // live lines on the terminal
	seen  map[int]map[string]int // node to stages shown of this boot
	boot  map[int]time.Time      // node to the power-on that seen belongs to
}

func newBoard(out io.Writer, style progress.Style, now func() time.Time) *board {
	return &board{out: out, style: style, now: now, seen: map[int]map[string]int{}, boot: map[int]time.Time{}}
}

// stageEvent is the JSON form of a change.
type stageEvent struct {
	Event    string  `json:"event"` // "stage"
	Node     int     `json:"node"`
	Hostname string  `json:"hostname"`
	Address  string  `json:"address"`
	Stage    string  `json:"stage"`
	Seconds  float64 `json:"seconds"` // since power-on
	Detail   string  `json:"detail,omitempty"`
}

// show brings the display up to date.
func (b *board) show(nodes []NodeReport) {
	if b.style == progress.Terminal {
		settled := !slices.ContainsFunc(nodes, func(n NodeReport) bool { return !n.Settled() })
		b.draw(nodes)
		if settled {
			b.drawn = 0 // what stands there stays
		}
		return
	}
	for _, n := range nodes {
		for _, s := range b.fresh(n) {
			b.line(n, s)
		}
	}
}

// fresh returns the stages of a machine that have not been shown yet. They may
// come late and out of order: a node tells what it did without a network when
// it has one.
func (b *board) fresh(n NodeReport) []StageTime {
	if n.powered.IsZero() {
		return nil
	}
	if b.boot[n.ID] != n.powered {
		b.boot[n.ID] = n.powered
		// SeaBIOS answers a reset with one of its own: a machine that was heard
		// of only as "firmware" begins nothing new.
		if len(b.seen[n.ID]) != 1 {
			b.seen[n.ID] = map[string]int{}
		}
	}
	seen := b.seen[n.ID]
	all := n.Stages
	if n.Stage == "off" || n.Stage == "crashed" {
		all = append(slices.Clip(all), StageTime{n.Stage, b.now().Sub(n.powered).Seconds(), n.Detail})
	}
	var fresh []StageTime
	count := map[string]int{}
	for _, s := range all {
		if count[s.Stage]++; count[s.Stage] > seen[s.Stage] {
			seen[s.Stage]++
			fresh = append(fresh, s)
		}
	}
	return fresh
}

func (b *board) line(n NodeReport, s StageTime) {
	switch b.style {
	case progress.JSON:
		line, _ := json.Marshal(stageEvent{"stage", n.ID, n.Hostname, n.Address.String(), s.Stage, s.Seconds, s.Detail})
		fmt.Fprintf(b.out, "%s\n", line)
	case progress.Plain:
		line := fmt.Sprintf("node %-3d %s  %s  %-10s %5.1f s  %s", n.ID, n.Hostname, n.Address, s.Stage, s.Seconds, s.Detail)
		fmt.Fprintln(b.out, strings.TrimRight(line, " "))
	}
}

// draw writes the live lines over the ones before.
func (b *board) draw(nodes []NodeReport) {
	if changed := b.changed(nodes); b.drawn == 0 && !changed {
		return
	}
	var s strings.Builder
	if b.drawn > 0 {
		fmt.Fprintf(&s, "\x1b[%dA", b.drawn)
	}
	width, wide := b.width(), 0
	for _, n := range nodes {
		wide = max(wide, len(n.Hostname))
	}
	for _, n := range nodes {
		seconds := n.Seconds
		if !n.Settled() && !n.powered.IsZero() {
			seconds = b.now().Sub(n.powered).Seconds()
		}
		line := fmt.Sprintf("  node %-3d %-*s  %-15s %-10s %6.1f s  %s", n.ID, wide, n.Hostname, n.Address, n.Stage, seconds, gauge(n))
		// A line that wraps would put the cursor's way up out of step.
		fmt.Fprintf(&s, "\r\x1b[K%s\n", cut(strings.TrimRight(line, " "), width-1))
	}
	b.drawn = len(nodes)
	io.WriteString(b.out, s.String())
}

// width is the terminal's, in columns.
func (b *board) width() int {
	if f, ok := b.out.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			return w
		}
	}
	return 80
}

// changed reports whether a machine did something since the lines were left
// standing.
func (b *board) changed(nodes []NodeReport) bool {
	any := false
	for _, n := range nodes {
		any = len(b.fresh(n)) > 0 || any
	}
	return any
}

// gauge is a bar of the boot's stages, or why there is nothing to wait for.
func gauge(n NodeReport) string {
	switch n.Stage {
	case "failed", "crashed":
		return n.Detail
	case "off", "waiting":
		return ""
	}
	done := 0
	for _, s := range n.Stages {
		done = max(done, slices.Index(stages, s.Stage)+1)
	}
	return strings.Repeat("█", done) + strings.Repeat("░", len(stages)-done)
}

func cut(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
