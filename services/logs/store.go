package logs

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"krgimage/services/cluster/wire"
)

// Limits of a Store: what it takes on disk is files * fileSize.
const (
	files        = 8
	fileSize     = 8 << 20 // bytes
	currentFile  = "nodes.jsonl"
	nodePerSec   = 200 // records of one node in the long run; nodes keep to less
	nodeBurst    = 5000
	storeDirMode = 0o700
)

// rotated is the name of the n-th file, 0 the current one.
func rotated(n int) string {
	if n == 0 {
		return currentFile
	}
	return fmt.Sprintf("nodes.%d.jsonl", n)
}

// Store is the head's side: it keeps the nodes' records in files. It is safe
// for use by several goroutines.
type Store struct {
	dir      string
	fileSize int64
	now      func() time.Time
	log      *slog.Logger

	mu     sync.Mutex
	file   *os.File              // guarded by mu; nil after Close
	size   int64                 // guarded by mu
	limits map[int]*rate.Limiter // guarded by mu; by node
	counts map[int]Counts        // guarded by mu
	broken bool                  // guarded by mu: the last write failed
}

// Counts says what came of a node's records.
type Counts struct{ Kept, Dropped uint64 }

// Open makes a Store in dir.
func Open(dir string, now func() time.Time, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(dir, storeDirMode); err != nil {
		return nil, fmt.Errorf("the nodes' logs: %w", err)
	}
	s := &Store{dir: dir, fileSize: fileSize, now: now, log: log.With("component", "logs"), limits: map[int]*rate.Limiter{}, counts: map[int]Counts{}}
	return s, s.open()
}

func (s *Store) open() error {
	f, err := os.OpenFile(filepath.Join(s.dir, currentFile), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("the nodes' logs: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("the nodes' logs: %w", err)
	}
	s.file, s.size = f, info.Size()
	// A head that was killed may have left half a line.
	if last := make([]byte, 1); s.size > 0 {
		if _, err := f.ReadAt(last, s.size-1); err == nil && last[0] != '\n' {
			n, _ := f.WriteString("\n")
			s.size += int64(n)
		}
	}
	return nil
}

// Add keeps a batch of a node. It is what cluster/coordinator calls.
func (s *Store) Add(node int, b *wire.LogBatch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return
	}
	now := s.now()
	limit := s.limits[node]
	if limit == nil {
		limit = rate.NewLimiter(nodePerSec, nodeBurst)
		s.limits[node] = limit
	}
	count := s.counts[node]
	lost := b.Dropped
	var text []byte
	for _, r := range b.Records {
		if !limit.AllowN(now, 1) {
			lost++
			continue
		}
		text = appendLine(text, fromWire(node, now, r))
		count.Kept++
	}
	if lost > 0 {
		text = appendLine(text, Record{Time: now, Received: now, Node: node, Level: slog.LevelWarn, Source: SourceLogs,
			Message: fmt.Sprintf("%d records were lost: too many at once", lost)})
		count.Dropped += lost
	}
	s.counts[node] = count
	s.write(text)
}

func fromWire(node int, now time.Time, r *wire.LogRecord) Record {
	out := Record{Time: time.Unix(0, r.TimeUnixNano).UTC(), Received: now.UTC(), Node: node, Level: slog.Level(r.Level), Source: cut(r.Source, 64), Message: cut(r.Message, maxMessage)}
	for k, v := range r.Attributes {
		if len(out.Attributes) == maxAttributes {
			break
		}
		if out.Attributes == nil {
			out.Attributes = map[string]string{}
		}
		out.Attributes[cut(k, maxValue)] = cut(v, maxValue)
	}
	return out
}

func appendLine(text []byte, r Record) []byte {
	line, err := json.Marshal(r)
	if err != nil {
		return text // a time beyond the year 9999
	}
	return append(append(text, line...), '\n')
}

func (s *Store) write(text []byte) {
	if s.size > 0 && s.size+int64(len(text)) > s.fileSize {
		if err := s.rotate(); err != nil {
			s.complain(err)
			return
		}
	}
	n, err := s.file.Write(text)
	s.size += int64(n)
	if err != nil {
		s.complain(err)
		return
	}
	s.broken = false
}

// complain says once that the disk is full or gone.
func (s *Store) complain(err error) {
	if !s.broken {
		s.log.Error("the nodes' log records can't be written; they are lost until this is mended", "err", err)
	}
	s.broken = true
}

func (s *Store) rotate() error {
	for n := files - 1; n > 0; n-- {
		err := os.Rename(filepath.Join(s.dir, rotated(n-1)), filepath.Join(s.dir, rotated(n)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	old := s.file
	if err := s.open(); err != nil {
		return err
	}
	return old.Close()
}

// Counts returns what came of each node's records since Open.
func (s *Store) Counts() map[int]Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}

// Close ends the Store; later batches are dropped.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	s.file = nil
	return err
}

// decode reads a line of a file.
func decode(line []byte) (Record, bool) {
	var r Record
	return r, json.Unmarshal(line, &r) == nil
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

// maxLine bounds a line of a file: JSON may double what a record has.
const maxLine = 4 * (maxMessage + 2*maxAttributes*maxValue)

func scanner(f *os.File) *bufio.Scanner {
	s := bufio.NewScanner(f)
	s.Buffer(make([]byte, 0, 64<<10), maxLine)
	return s
}
