// What g++ 11 and newer take from the C and C++ runtime of their own time: defined here, a library
// loads under the older one of the wheel's platform too. Only in builds with HQOD_PORTABLE; see
// scripts/old_runtime.py.
#include <cstdlib>
#include <new>
#include <sstream>

// glibc 2.32. Zero: there may be other threads, so that shared pointers count atomically.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded;
}

// GLIBCXX_3.4.26: default constructors, which older headers gave an argument.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// GLIBCXX_3.4.29: the copying half of what was one function before C++20.
template std::string std::basic_stringbuf<char>::str() const&;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
