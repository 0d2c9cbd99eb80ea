package krgadm

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// selector says how the nodes of an action are named.
type selector int

const (
	byNothing selector = iota
	byList
	byCount
	byTotal
	byAll
)

// options are the options of one call.
type options struct {
	selector selector
	list     []int // byList: ascending, as given: unchecked against the cluster's size
	number   int   // byCount, byTotal
	json     bool
	help     bool
	timeout  time.Duration // 0: wait for ever
}

const oneSelectorOnly = "Only one of --all, --count, --total or --nodes option is\nsupported. Aborting.\n"

// inputError is a bad option value; its text is the whole message.
type inputError string

func (e inputError) Error() string { return string(e) }

// option is one entry of getopt_long(3)'s table.
type option struct {
	long  string
	short byte
	value bool
	ours  bool // unknown to Kerrighed: its abbreviations go before ours
}

var table = []option{
	{"nodes", 'n', true, false}, {"count", 'c', true, false}, {"total", 't', true, false}, {"all", 'a', false, false},
	{"help", 'h', false, true}, {"json", 'j', false, true}, {"timeout", 'T', true, true},
}

// parse reads options as getopt_long(3) does: -nLIST, -n LIST, --nodes=LIST,
// --nodes LIST, and unambiguous abbreviations of long names.
func parse(args []string) (options, error) {
	var o options
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			if len(args) > 0 {
				return o, misuse(fmt.Sprintf("unexpected argument %q", args[0]))
			}
		case strings.HasPrefix(arg, "--"):
			name, value, inline := strings.Cut(arg[2:], "=")
			opt, ok := findLong(name)
			switch {
			case !ok:
				return o, misuse(fmt.Sprintf("unknown option %q", "--"+name))
			case opt.value && !inline && len(args) == 0:
				return o, misuse(fmt.Sprintf("--%s wants a value", opt.long))
			case opt.value && !inline:
				value, args = args[0], args[1:]
			case !opt.value && inline:
				return o, misuse(fmt.Sprintf("--%s takes no value", opt.long))
			}
			if err := o.set(opt.short, value); err != nil {
				return o, err
			}
		case len(arg) > 1 && arg[0] == '-':
			for rest := arg[1:]; rest != ""; {
				opt, ok := findShort(rest[0])
				if !ok {
					return o, misuse(fmt.Sprintf("unknown option %q", "-"+rest[:1]))
				}
				value := ""
				rest = rest[1:]
				switch {
				case opt.value && rest != "":
					value, rest = rest, ""
				case opt.value && len(args) == 0:
					return o, misuse(fmt.Sprintf("-%c wants a value", opt.short))
				case opt.value:
					value, args = args[0], args[1:]
				}
				if err := o.set(opt.short, value); err != nil {
					return o, err
				}
			}
		default:
			return o, misuse(fmt.Sprintf("unexpected argument %q", arg))
		}
	}
	return o, nil
}

func findShort(c byte) (option, bool) {
	for _, o := range table {
		if o.short == c {
			return o, true
		}
	}
	return option{}, false
}

func findLong(name string) (option, bool) {
	for _, ours := range []bool{false, true} {
		var found []option
		for _, o := range table {
			if o.long == name {
				return o, true
			}
			if o.ours == ours && name != "" && strings.HasPrefix(o.long, name) {
				found = append(found, o)
			}
		}
		if len(found) > 0 {
			return found[0], len(found) == 1
		}
	}
	return option{}, false
}

func (o *options) set(short byte, value string) error {
	var err error
	choose := func(s selector) error {
		if o.selector != byNothing {
			return inputError(oneSelectorOnly)
		}
		o.selector = s
		return nil
	}
	switch short {
	case 'n':
		if err := choose(byList); err != nil {
			return err
		}
		o.list, err = parseList(value)
	case 'c', 't':
		s := byCount
		if short == 't' {
			s = byTotal
		}
		if err := choose(s); err != nil {
			return err
		}
		if o.number, err = strtol(value); err != nil {
			return inputError(fmt.Sprintf("nodes number: %s\n", strerror(err)))
		}
	case 'a':
		return choose(byAll)
	case 'j':
		o.json = true
	case 'h':
		o.help = true
	case 'T':
		o.timeout, err = parseTimeout(value)
	}
	return err
}

// parseTimeout takes seconds, or a number with a unit as in 2m30s.
func parseTimeout(value string) (time.Duration, error) {
	d, err := time.ParseDuration(value)
	if seconds, e := strconv.ParseFloat(value, 64); e == nil {
		d, err = time.Duration(seconds*float64(time.Second)), nil
	}
	if err != nil || d <= 0 {
		return 0, misuse(fmt.Sprintf("--timeout %q: want seconds, or a time such as 2m30s", value))
	}
	return d, nil
}

// maxID bounds what a list may name before it is held against the cluster's
// real size; it keeps 0-999999999 from taking memory.
const maxID = 1 << 16

// parseList reads LIST: items separated by commas, each an id or id-id. Reversed
// ranges are empty, ids that can't exist are dropped.
func parseList(s string) ([]int, error) {
	seen := map[int]bool{}
	for item := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(item, "-")
		what := "node"
		if isRange {
			what = "first node range"
		}
		from, err := strtol(first)
		if err != nil {
			return nil, inputError(fmt.Sprintf("%s: %s\n", what, strerror(err)))
		}
		to := from
		if isRange {
			if to, err = strtol(last); err != nil {
				return nil, inputError(fmt.Sprintf("end node range: %s\n", strerror(err)))
			}
		}
		for id := max(from, 0); id <= min(to, maxID); id++ {
			seen[id] = true
		}
	}
	return ascending(seen), nil
}

// strtol reads a whole decimal number as strtol(3) does: leading blanks and a
// sign are fine, a number too large is the largest.
func strtol(s string) (int, error) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	n, err := strconv.ParseInt(strings.TrimPrefix(s, "+"), 10, 64)
	if strings.HasPrefix(s, "+-") || strings.HasPrefix(s, "++") || err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, unix.EINVAL
	}
	return int(n), nil
}
