package bootlog

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Console writes lines to every active console of the kernel and keeps them in
// the kernel's log. Writing never blocks a boot: a console that doesn't take
// its lines (a serial line with flow control and nobody there) loses them.
type Console struct {
	lines chan []byte
	idle  chan chan struct{}
}

// backlog is the number of lines that wait for slow consoles.
const backlog = 512

// OpenConsole opens the consoles that the kernel lists as active and /dev/kmsg.
// What can't be opened is left out: a node without a console still boots.
func OpenConsole() *Console {
	// Ten lines in five seconds is the default for user space.
	_ = os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0)
	var outs []io.Writer
	for _, name := range Devices() {
		if f, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
			outs = append(outs, f)
		}
	}
	if f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		outs = append(outs, kmsg{f})
	}
	return NewConsole(outs...)
}

// Devices lists the device files of the active consoles; the last is the one
// that /dev/console stands for.
func Devices() []string {
	text, err := os.ReadFile("/sys/class/tty/console/active")
	names := strings.Fields(string(text))
	if err != nil || len(names) == 0 {
		return []string{"/dev/console"}
	}
	for i, n := range names {
		names[i] = filepath.Join("/dev", n)
	}
	return names
}

// NewConsole writes to outs, each line with one Write.
func NewConsole(outs ...io.Writer) *Console {
	c := &Console{lines: make(chan []byte, backlog), idle: make(chan chan struct{})}
	go func() { // lives as long as the process
		for {
			select {
			case l := <-c.lines:
				for _, out := range outs {
					_, _ = out.Write(l)
				}
			case done := <-c.idle:
				if len(c.lines) > 0 {
					go func() { c.idle <- done }()
					continue
				}
				close(done)
			}
		}
	}()
	return c
}

// Write queues p, which should be whole lines.
func (c *Console) Write(p []byte) (int, error) {
	select {
	case c.lines <- bytes.Clone(p):
	default:
	}
	return len(p), nil
}

// Flush waits until everything written so far is out, but at most for d.
func (c *Console) Flush(d time.Duration) {
	done := make(chan struct{})
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case c.idle <- done:
	case <-t.C:
		return
	}
	select {
	case <-done:
	case <-t.C:
	}
}

// kmsg writes records at level debug: they stay in dmesg, and the kernel
// doesn't print them a second time on the consoles.
type kmsg struct{ w io.Writer }

func (k kmsg) Write(p []byte) (int, error) {
	const priority = 3<<3 | 7 // facility daemon, level debug
	text := p
	if i := bytes.Index(p, []byte("] ")); i >= 0 && p[0] == '[' {
		text = p[i+2:] // the kernel has its own time stamp
	}
	_, err := fmt.Fprintf(k.w, "<%d>%s", priority, text)
	return len(p), err
}

// Uptime is the time since the kernel started, as dmesg counts it.
func Uptime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

// Handler is a slog.Handler whose lines look like the kernel's:
//
//	[    4.217000] krg: message key=value
//
// They carry the uptime, since the wall clock isn't right yet and reading the
// time zone would touch the root file system.
type Handler struct {
	out    io.Writer
	level  slog.Level
	uptime func() time.Duration
	attrs  string
	mu     *sync.Mutex
}

// NewHandler writes records of at least level to out.
func NewHandler(out io.Writer, level slog.Level, uptime func() time.Duration) *Handler {
	return &Handler{out: out, level: level, uptime: uptime, mu: &sync.Mutex{}}
}

// Enabled is part of slog.Handler.
func (h *Handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// Handle is part of slog.Handler.
func (h *Handler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	up := h.uptime()
	fmt.Fprintf(&b, "[%5d.%06d] krg: ", up/time.Second, up%time.Second/time.Microsecond)
	switch {
	case r.Level >= slog.LevelError:
		b.WriteString("error: ")
	case r.Level >= slog.LevelWarn:
		b.WriteString("warning: ")
	}
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool { b.WriteString(attr(a)); return true })
	b.WriteByte('\n')
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.out, b.String())
	return err
}

// WithAttrs is part of slog.Handler.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	for _, a := range attrs {
		c.attrs += attr(a)
	}
	return &c
}

// WithGroup is part of slog.Handler; the node's lines have no groups.
func (h *Handler) WithGroup(string) slog.Handler { return h }

func attr(a slog.Attr) string {
	v := a.Value.Resolve().String()
	if v == "" || strings.ContainsAny(v, " \t\n\r\"=") {
		v = strconv.Quote(v)
	}
	return " " + a.Key + "=" + v
}
