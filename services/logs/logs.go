// Package logs brings what the nodes have to say to the head node.
//
// On a node a Collector takes records (the daemon's own through a slog.Handler,
// the kernel's and init's from /dev/kmsg, the container's services' from init)
// and hands them to the stream in batches. It keeps a bounded number of them
// while there is no stream, and takes only so many a second of each source: what
// is too much is counted and dropped, so that a program that writes without end
// costs neither memory nor network.
//
// On the head a Store writes them to files of bounded size, one JSON object a
// line, and Read and Follow read these. They work without a running head, too.
//
// Nothing here is to be relied on for anything but reading: a batch that was
// under way when a stream broke is lost.
package logs

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/time/rate"

	"krgimage/services/cluster/wire"
)

// Record is one message of a node, as the head keeps it.
type Record struct {
	Time       time.Time         `json:"time"`     // by the node's clock
	Received   time.Time         `json:"received"` // by the head's clock
	Node       int               `json:"node"`
	Level      slog.Level        `json:"level"`
	Source     string            `json:"source"` // krgd, init, kernel, container, logs
	Message    string            `json:"message"`
	Attributes map[string]string `json:"attributes,omitempty"`
}

// Sources that this package names itself.
const (
	SourceDaemon    = "krgd"
	SourceInit      = "init"
	SourceKernel    = "kernel"
	SourceContainer = "container"
	SourceLogs      = "logs" // how many records were lost
)

// Limits of a record; longer ones are cut.
const (
	maxMessage    = 2 << 10 // bytes
	maxAttributes = 16
	maxValue      = 512 // bytes
)

// Limits of a node.
const (
	perSecond = 20  // records of one source, in the long run
	burst     = 500 // records of one source at once: a boot has that many
	queue     = 1000
	perBatch  = 100
	pause     = 200 * time.Millisecond // for records that come together
)

// Collector is a node's side. Make one with NewCollector.
type Collector struct {
	now     func() time.Time
	batches chan *wire.LogBatch
	wake    chan struct{}

	mu      sync.Mutex
	records []*wire.LogRecord        // guarded by mu; oldest first
	dropped uint64                   // guarded by mu; since the last batch
	limits  map[string]*rate.Limiter // guarded by mu; by source
}

// NewCollector returns a Collector whose records have their time from now.
func NewCollector(now func() time.Time) *Collector {
	return &Collector{now: now, batches: make(chan *wire.LogBatch), wake: make(chan struct{}, 1), limits: map[string]*rate.Limiter{}}
}

// Batches is where Run hands over batches.
func (c *Collector) Batches() <-chan *wire.LogBatch { return c.batches }

// Add takes a record; it never waits.
func (c *Collector) Add(source string, level slog.Level, message string, attributes map[string]string) {
	now := c.now()
	r := &wire.LogRecord{TimeUnixNano: now.UnixNano(), Level: int32(level), Source: source, Message: cut(message, maxMessage)}
	for k, v := range attributes {
		if len(r.Attributes) == maxAttributes {
			break
		}
		if r.Attributes == nil {
			r.Attributes = map[string]string{}
		}
		r.Attributes[cut(k, maxValue)] = cut(v, maxValue)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	limit := c.limits[source]
	if limit == nil {
		limit = rate.NewLimiter(perSecond, burst)
		c.limits[source] = limit
	}
	if !limit.AllowN(now, 1) {
		c.dropped++
		return
	}
	if len(c.records) == queue {
		c.records = c.records[1:]
		c.dropped++
	}
	c.records = append(c.records, r)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run makes batches until ctx ends.
func (c *Collector) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		for b := c.take(); b != nil; b = c.take() {
			select {
			case <-ctx.Done():
				return nil
			case c.batches <- b:
			}
		}
	}
}

func (c *Collector) take() *wire.LogBatch {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(len(c.records), perBatch)
	if n == 0 {
		return nil
	}
	b := &wire.LogBatch{Records: append([]*wire.LogRecord(nil), c.records[:n]...), Dropped: c.dropped}
	c.records, c.dropped = c.records[n:], 0
	return b
}

// cut makes s valid UTF-8 of at most n bytes.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n-len("…")] + "…"
	}
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, string(utf8.RuneError))
}

// Handler is a slog.Handler into the Collector, from level on.
func (c *Collector) Handler(level slog.Leveler) slog.Handler { return &handler{c: c, level: level} }

type handler struct {
	c      *Collector
	level  slog.Leveler
	attrs  []slog.Attr // with their groups' names
	prefix string      // names of the groups, each with a dot behind
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	attributes := map[string]string{}
	for _, a := range h.attrs {
		flatten(attributes, "", a)
	}
	r.Attrs(func(a slog.Attr) bool { flatten(attributes, h.prefix, a); return true })
	h.c.Add(SourceDaemon, r.Level, r.Message, attributes)
	return nil
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := *h
	next.attrs = append([]slog.Attr(nil), h.attrs...)
	for _, a := range attrs {
		a.Key = h.prefix + a.Key
		next.attrs = append(next.attrs, a)
	}
	return &next
}

func (h *handler) WithGroup(name string) slog.Handler {
	next := *h
	next.prefix += name + "."
	return &next
}

func flatten(to map[string]string, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() != slog.KindGroup {
		to[prefix+a.Key] = v.String()
		return
	}
	if a.Key != "" {
		prefix += a.Key + "."
	}
	for _, b := range v.Group() {
		flatten(to, prefix, b)
	}
}

// Text is a record on one line for people. What a terminal could take for a
// command is escaped: nodes write what strangers sent them.
func (r Record) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s node %-3d %-9s %-5s %s", r.Time.Local().Format("2006-01-02 15:04:05.000"), r.Node, printable(r.Source), r.Level, printable(r.Message))
	for _, k := range sortedKeys(r.Attributes) {
		v := printable(r.Attributes[k])
		if v == "" || strings.ContainsAny(v, " \"=") {
			v = strconv.Quote(v)
		}
		fmt.Fprintf(&b, " %s=%s", printable(k), v)
	}
	return b.String()
}

func printable(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	q := strconv.Quote(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
