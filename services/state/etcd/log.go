package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// slogger passes etcd's own log on, quietly: what it tells of its daily life is
// for debugging. It also keeps the last fatal message, and makes of etcd's way
// out in such a case, which is to end the process, the end of one goroutine.
type slogger struct {
	log *slog.Logger

	once  sync.Once
	fatal chan struct{} // closed after a fatal message

	mu   sync.Mutex
	last string // the fatal message; guarded by mu
}

func logger(log *slog.Logger) *slogger {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &slogger{log: log.With("component", "etcd"), fatal: make(chan struct{})}
}

func (l *slogger) zap() *zap.Logger {
	return zap.New(core{l, nil}, zap.WithFatalHook(exit{l}), zap.WithPanicHook(exit{l}))
}

func (l *slogger) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == "" {
		return nil
	}
	return fmt.Errorf("etcd: %s", l.last)
}

// exit is what etcd does after a message of level panic or fatal.
type exit struct{ l *slogger }

// OnWrite implements zapcore.CheckWriteHook.
func (x exit) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	x.l.mu.Lock()
	if x.l.last == "" {
		x.l.last = text(e.Entry, fields)
	}
	x.l.mu.Unlock()
	x.l.once.Do(func() { close(x.l.fatal) })
	runtime.Goexit()
}

// core is a zapcore.Core.
type core struct {
	l      *slogger
	fields []zapcore.Field
}

// harmless are warnings that say nothing to the admin of a head.
var harmless = []string{
	"Running http and grpc server on single port",
	"simple token is not cryptographically signed",
	"failed to get hash kv response from peer", // before the others are up
}

func (c core) level(e zapcore.Entry) slog.Level {
	switch {
	case e.Level >= zapcore.ErrorLevel:
		return slog.LevelError
	case e.Level == zapcore.WarnLevel:
		for _, h := range harmless {
			if strings.HasPrefix(e.Message, h) {
				return slog.LevelDebug
			}
		}
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (c core) Enabled(level zapcore.Level) bool {
	if level < zapcore.InfoLevel {
		return false
	}
	return level > zapcore.InfoLevel || c.l.log.Enabled(context.Background(), slog.LevelDebug)
}

func (c core) With(fields []zapcore.Field) zapcore.Core {
	return core{c.l, append(append([]zapcore.Field{}, c.fields...), fields...)}
}

func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.l.log.Log(context.Background(), c.level(e), text(e, append(append([]zapcore.Field{}, c.fields...), fields...)))
	return nil
}

func (c core) Sync() error { return nil }

// text is a message with its fields in one line.
func text(e zapcore.Entry, fields []zapcore.Field) string {
	enc := zapcore.NewMapObjectEncoder()
	var names []string
	for _, f := range fields {
		if f.Key == "stacktrace" || f.Type == zapcore.SkipType {
			continue
		}
		f.AddTo(enc)
		names = append(names, f.Key)
	}
	var b strings.Builder
	b.WriteString(e.Message)
	for i, name := range names {
		fmt.Fprintf(&b, "%s%s %v", map[bool]string{true: ": ", false: ", "}[i == 0], name, enc.Fields[name])
	}
	return b.String()
}
